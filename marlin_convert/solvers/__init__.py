"""Pure numerics, tensors in, tensors out: Hessians, scales, codes."""
