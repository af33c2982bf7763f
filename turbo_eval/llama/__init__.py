"""llama.cpp: its source at the pin, the series, builds, command lines and what its tools print."""
