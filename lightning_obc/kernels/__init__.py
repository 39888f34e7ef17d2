"""Fast inner loops behind one dispatch: the OBS sweep and the Hessian update."""
