// The operations of a training step: their items are shared by the threads.

#include "train.h"

#include "multiply.h"
#include "pool.h"

namespace {

struct Call {
    rq::Train run;
    const void *arguments;
};

void share(void *context, int64_t first, int64_t last) {
    const Call &call = *static_cast<const Call *>(context);
    call.run(call.arguments, first, last);
}

}  // namespace

extern "C" int rq_train(int operation, const void *arguments, int64_t num_items) {
    if (operation < 0 || operation >= rq::NUM_OPERATIONS) return RQ_BAD_KIND;
    if (num_items < 0) return RQ_BAD_SHAPE;
    Call call{rq::kernels().train[operation], arguments};
    return rq::parallel(share, &call, num_items) ? RQ_OK : RQ_NO_MEMORY;
}
