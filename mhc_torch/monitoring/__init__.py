"""What the connections of a model do while it trains: figures, pictures, stability, profiles."""
