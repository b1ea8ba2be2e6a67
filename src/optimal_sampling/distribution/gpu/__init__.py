"""The mixture in Triton programs: `launch` starts them, `programs` is what runs on the GPU."""
