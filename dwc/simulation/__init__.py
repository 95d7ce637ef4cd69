"""Simulated heads and scans; `dwc.training` never imports them."""
