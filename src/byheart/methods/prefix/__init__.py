"""Retrieved documents as keys and values of a frozen model."""
