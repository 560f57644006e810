"""A class-conditional model of scikit-learn's handwritten digits (8x8 pixels), its judge, and how both were made."""
