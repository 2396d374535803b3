"""Other forms of a finished network: ONNX, torch.export, sparse storage."""
