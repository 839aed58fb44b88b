"""A look at a run while it trains: its pools answer, between two steps, through the gateway of the served model."""
