"""Weight updates ΔW in float64, one module per kind. LoRA updates stay in factor space: no d×d matrix is built."""
