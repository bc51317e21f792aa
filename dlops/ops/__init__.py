"""The ops: one file each, with its autograd.Function and what compilers and transforms need of it."""
