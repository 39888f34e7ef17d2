"""Fast inner loops behind one dispatch: the OBS sweep, the exact refit on a mask, and the Hessian update."""
