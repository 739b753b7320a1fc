"""What the connections of a model do while it trains, and where a NaN comes from."""
