"""What models cost: floating-point operations, parameters and memory; and what chips can do."""
