"""The ops: one file each, with its autograd.Function and what compilers need of it."""
