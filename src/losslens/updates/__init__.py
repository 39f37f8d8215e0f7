"""Weight updates ΔW, one file a kind; float64. LoRA's stay in factor space: no d×d matrix is ever built of them."""
