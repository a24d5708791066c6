# lminf_cuda_architectures(VERSION RESULT): the GPUs to compile for, by the release of nvcc.
#
# Machine code for every GPU since Ampere that the compiler knows; PTX of the last for those to
# come, and of the first for what has no machine code here. CUDA 13 has dropped GPUs before 7.5 only.
function(lminf_cuda_architectures version result)
  if(version VERSION_LESS 11.8)
    message(FATAL_ERROR
      "CUDA ${version}: 11.8 or later is needed; set CMAKE_CUDA_ARCHITECTURES to try all the same")
  elseif(version VERSION_LESS 12.8)
    set(${result} 80 86-real 89-real 90 PARENT_SCOPE)
  else()
    set(${result} 80 86-real 89-real 90-real 100-real 120 PARENT_SCOPE)
  endif()
endfunction()
