"""Finding the types of each layer: sensitivities, the best use of a number of bits, proof on other text."""
