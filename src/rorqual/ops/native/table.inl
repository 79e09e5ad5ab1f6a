// The kernels of an instruction set: included at the end of its namespace, which has a LEVEL.

const Kernels table = {
    LEVEL,
    {{product<Bf16>, bf16_decode},
     {product<Q8_0>, q8_0_decode},
     {product<Q4_K>, q4_k_decode},
     {product<Q6_K>, q6_k_decode},
     {product<F32>, f32_decode}},
    quantise_row,
    &rows,
    encode,
    train,
};
