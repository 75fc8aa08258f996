"""The mathematics of diffusion: no files, no loops over data, no devices."""
