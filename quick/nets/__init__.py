"""Networks: losses, pretrained weights, transfer learning, tables and export."""
