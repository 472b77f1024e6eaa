"""Runs what Triton compiled for an NVIDIA GPU, instruction by instruction, on the CPU.

``compiler`` compiles a kernel as its launcher would, ``language`` reads the PTX, ``machine`` runs it and faults on what a GPU
would leave undefined, ``executor`` puts the machine in the place of the GPU under the project's own launches.
"""
