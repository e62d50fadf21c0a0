"""What a GPU would do: counted on fake CUDA tensors where there is none, measured where there is one."""
