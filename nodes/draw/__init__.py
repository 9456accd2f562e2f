"""Pictures that the nodes show, drawn with Pillow."""
