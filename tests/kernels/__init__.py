"""Tests of the kernels in patches/, on real or emulated processors."""
