"""The room `methods/time`: gradients through sequences of states: ODEs, samplers, recurrences."""
