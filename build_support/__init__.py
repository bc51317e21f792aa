"""What setup.py is made of: checks of the build machine, the CUDA toolkit, the build command."""
