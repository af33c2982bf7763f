"""The worker's side: a device, the files and builds it has, cells measured on request."""
