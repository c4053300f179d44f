"""What every loader of model weights needs: torch devices and dtypes by name, and clear errors for failed downloads."""
