// The likeliest tokens that llama.cpp adds to a prompt of token ids, in 32 bits: bench/gguf_families.py says how it is built.
//
//     llama_tokens MODEL.gguf COUNT ID...

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "llama.h"

static void errors_only(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR) {
        fputs(text, stderr);
    }
}

int main(int argc, char ** argv) {
    if (argc < 4) {
        fprintf(stderr, "usage: %s MODEL.gguf COUNT ID...\n", argv[0]);
        return 2;
    }
    llama_log_set(errors_only, nullptr);
    llama_backend_init();
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (model == nullptr) {
        return 1;
    }
    std::vector<llama_token> tokens;
    for (int i = 3; i < argc; i++) {
        tokens.push_back(atoi(argv[i]));
    }
    const int count = atoi(argv[2]);
    llama_context_params wanted = llama_context_default_params();
    wanted.n_ctx = tokens.size() + count;
    wanted.n_batch = wanted.n_ubatch = wanted.n_ctx;
    wanted.n_threads = wanted.n_threads_batch = 1;
    wanted.type_k = wanted.type_v = GGML_TYPE_F32;
    wanted.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    llama_context * context = llama_init_from_model(model, wanted);
    if (context == nullptr) {
        return 1;
    }
    const int rows = llama_vocab_n_tokens(llama_model_get_vocab(model));
    std::vector<llama_token> step = tokens;
    for (int i = 0; i < count; i++) {
        if (llama_decode(context, llama_batch_get_one(step.data(), step.size())) != 0) {
            return 1;
        }
        const float * logits = llama_get_logits_ith(context, -1);
        step = {(llama_token) (std::max_element(logits, logits + rows) - logits)};
        printf("%d\n", step[0]);
    }
    llama_free(context);
    llama_model_free(model);
    return 0;
}
