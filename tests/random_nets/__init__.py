"""Random networks: small programs of tensor operations, drawn one choice at a time, and the module that runs one.

A program is plain data. `draw_program` builds it from any source of choices: hypothesis in the tests, a random
generator in a hunt for bugs. `Net` is its network, and `masked_twin` helps to check what became of it.

    program     what a program is: inputs, steps, outputs
    shapes      kinds of values: images, sequences, vectors
    op          what every operation says of itself
    operations  the operations, a file for each family, each written the way users write it
    catalogue   all of them in one list, with how often each is drawn
    drawing     draws a program
    net         runs it
    oracle      what its layers compute when channels that are gone do not count

To add an operation, write its class in a family and list it in the catalogue.
"""

from random_nets.catalogue import operation_names
from random_nets.drawing import draw_program
from random_nets.net import Net, example_inputs
from random_nets.oracle import Live, masked_twin
from random_nets.program import Program, Step

__all__ = ["Live", "Net", "Program", "Step", "draw_program", "example_inputs", "masked_twin", "operation_names"]
