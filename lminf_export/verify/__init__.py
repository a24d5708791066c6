"""Does a bundle compute what its model does? The checks behind `lminf validate`."""
