"""Other methods on the same model, and all of them head to head at equal cost."""
