"""The method ``memory``: small trained networks in the residual stream of a frozen model."""
