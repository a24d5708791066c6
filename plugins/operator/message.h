// One-line messages.
#pragma once

#include <sstream>
#include <string>

namespace lminf {

template <class... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

}  // namespace lminf
