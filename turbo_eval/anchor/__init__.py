"""The K anchor: what models carry, calibration, its effect."""
