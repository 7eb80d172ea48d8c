"""Operators of srlm-fast, one file each; installed as `srlm_fast.kernels`."""
