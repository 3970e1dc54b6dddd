"""kvpo_min: the smallest complete KVPO (arXiv 2605.14278)."""
