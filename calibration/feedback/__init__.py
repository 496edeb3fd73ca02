"""The `feedback` quantizer: every rounding error is compensated by the weights that are rounded after it.

Order of a layer: attention's readers, o_proj on the rounded heads' outputs, routed experts (w1 and w3, then w2 on what
the rounded two give), and last the MLP that sees every token. For one weight W [N, K] whose inputs x have the second
moment H, the codes and scales minimise tr (T - Q) H (T - Q)^T, where T is the weight that best gives the source's
output from the quantized stream's input:

    moments   H and the cross moment, per expert, from its own rows, weighted by the squared gate
    evidence  damping, ridge and prior, from the number of rows
    targets   T
    grids     the scales to start from
    columns   codes, column by column: the GPTQ sweep and coordinate descent are one loop
    points    codes and errors of all columns at once
    refit     the best scales for given codes
    solve     these steps in their order, for a stack of weights

Sources: GPTQ (arXiv:2210.17323), GPTAQ's targets (arXiv:2504.02692).
"""
