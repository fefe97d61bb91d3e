"""What runs inside a forward pass: hooks -> prompt -> scores -> policy -> compact or mask -> outputs."""
