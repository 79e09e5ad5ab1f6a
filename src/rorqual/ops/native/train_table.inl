// By `Operation`: included at the end of a namespace of each instruction set.

extern const Train train[NUM_OPERATIONS] = {
    norm, norm_grad, swiglu, swiglu_grad, gather, scatter, sort_pairs, cross_entropy,
    route, route_grad, attend, attend_grad, rope_grad,
};
