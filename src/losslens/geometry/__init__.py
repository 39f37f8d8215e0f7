"""Weight updates ΔW = s·B·A, compared in factor space: no d×d matrix is ever built. All arithmetic is float64."""
