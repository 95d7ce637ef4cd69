"""Networks for other people's programs: ONNX files and MONAI bundles."""
