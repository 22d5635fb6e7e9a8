"""Floor 4: all modes compared with each other and with PyTorch. Starts programs; is no rank itself."""
