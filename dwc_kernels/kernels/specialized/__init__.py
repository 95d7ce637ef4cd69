"""Forward and input gradient for sm_90 in bf16, in gluon, with warps that have different tasks.

One warp copies, two draw noise and eight multiply (`rings`, `kernels`). Their tiles (`variant`) are candidates of
`dwc_kernels.tune`, which the model never chooses: they run where they were measured to be right and fastest.
"""
