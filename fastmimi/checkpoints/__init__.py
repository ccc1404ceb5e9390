"""Loading and saving weights, in transformers' layout and in Kyutai's."""
