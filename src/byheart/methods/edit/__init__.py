"""Edit: facts written into the weights of a model's MLPs (MEMIT; Meng et al., ICLR 2023), and its baselines."""
