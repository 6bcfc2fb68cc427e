"""What our work asks of CUDA and cuDNN as a whole: captures, switches, memory that ran out."""
