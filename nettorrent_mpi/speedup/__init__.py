"""The comparison of all modes with each other and with PyTorch. It starts programs and is no rank itself."""
