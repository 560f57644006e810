"""Masks: which weights may change."""

SALIENCY = {  # by name, what scores a weight θ with the gradients g of the forget set's loss
    "gradient": "|Σ g|, SalUn's",
    "gradient-weight": "|Σ g · θ|, how much the loss would change without the weight (to first order)",
    "fisher": "Σ g² over single pictures, the diagonal of the Fisher information",
    "contrast": "|Σ g| where the retain set's is not greater than usual: divided by 1 + |Σ g_r| / its mean",
    "random": "nothing: a control",
    "magnitude": "|θ|: a control",
}
