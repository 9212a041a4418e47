"""Holds the models, their loss and their counts of parameters and FLOPs; neither data nor training is known here."""
