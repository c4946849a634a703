"""Export of models as neuron-cached bundles, which run below the model's size, and in other people's engines."""
