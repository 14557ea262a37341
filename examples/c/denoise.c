/* Draws a digit with ONNX Runtime's C API: the op library is the one line that a rewritten model needs.
 *
 *     denoise MODEL LIBRARY DIGIT PICTURE.pgm
 *
 * MODEL is examples/digits/digits-dit.onnx, rewritten or not. Prints the library's counters. 50 steps of DDIM with guidance.
 */
#include <dlfcn.h>
#include <math.h>
#include <onnxruntime_c_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SIDE = 32, PIXELS = SIDE * SIDE, STEPS = 50, TRAINED_STEPS = 1000, NO_CLASS = 10 };
static const float GUIDANCE = 2.0f;

static const OrtApi *ort;

static void check(OrtStatus *status) {
    if (status == NULL) return;
    fprintf(stderr, "denoise: %s\n", ort->GetErrorMessage(status));
    ort->ReleaseStatus(status);
    exit(2);
}

/* The model's view of the picture: both halves of guidance in one batch, the conditional one first. */
static void predict(OrtSession *session, const OrtMemoryInfo *memory, const float *picture, int64_t timestep, int64_t digit,
                    float *noise) {
    float latents[2 * PIXELS];
    memcpy(latents, picture, sizeof latents / 2);
    memcpy(latents + PIXELS, picture, sizeof latents / 2);
    int64_t timesteps[2] = {timestep, timestep}, labels[2] = {digit, NO_CLASS};
    const int64_t shape[4] = {2, 1, SIDE, SIDE};

    const char *inputs[3] = {"hidden_states", "timestep", "class_labels"}, *outputs[1] = {"out"};
    OrtValue *fed[3] = {NULL}, *seen[1] = {NULL};
    check(ort->CreateTensorWithDataAsOrtValue(memory, latents, sizeof latents, shape, 4, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, &fed[0]));
    check(ort->CreateTensorWithDataAsOrtValue(memory, timesteps, sizeof timesteps, shape, 1, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, &fed[1]));
    check(ort->CreateTensorWithDataAsOrtValue(memory, labels, sizeof labels, shape, 1, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, &fed[2]));
    check(ort->Run(session, NULL, inputs, (const OrtValue *const *)fed, 3, outputs, 1, seen));

    void *data = NULL;
    check(ort->GetTensorMutableData(seen[0], &data));
    const float *with = data, *without = with + PIXELS;
    for (int i = 0; i < PIXELS; i++) noise[i] = without[i] + GUIDANCE * (with[i] - without[i]);
    ort->ReleaseValue(seen[0]);
    for (int i = 0; i < 3; i++) ort->ReleaseValue(fed[i]);
}

/* The part of the picture in what is seen at a timestep; all of it before the first. Betas rise linearly from 1e-4 to 0.02. */
static double kept(int64_t timestep) {
    double product = 1.0;
    for (int64_t t = 0; timestep > 0 && t <= timestep; t++) product *= 1.0 - (1e-4 + (0.02 - 1e-4) * (double)t / (TRAINED_STEPS - 1));
    return product;
}

static double uniform(void) {
    static unsigned long long state = 1;
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return ((double)(state >> 33) + 0.5) / 2147483648.0;
}

static void print_counters(const char *library) {
    void *handle = dlopen(library, RTLD_NOW);
    size_t (*stats)(char *, size_t) = NULL;
    if (handle != NULL) *(void **)&stats = dlsym(handle, "ditfastattn_stats");
    if (stats == NULL) {
        fprintf(stderr, "denoise: %s: expected an op library with ditfastattn_stats: %s\n", library, dlerror());
        exit(2);
    }
    size_t length = stats(NULL, 0) + 256;
    char *text = malloc(length);
    if (text == NULL) abort();
    stats(text, length);
    puts(text);
    free(text);
}

int main(int argc, char **argv) {
    if (argc != 5 || strlen(argv[3]) != 1 || argv[3][0] < '0' || argv[3][0] > '9') {
        fprintf(stderr, "usage: denoise MODEL LIBRARY DIGIT PICTURE.pgm\n");
        return 2;
    }
    /* 17: the oldest API that the op library works with. */
    ort = OrtGetApiBase()->GetApi(17);
    if (ort == NULL) {
        fprintf(stderr, "denoise: ONNX Runtime is %s: expected 1.17 or later\n", OrtGetApiBase()->GetVersionString());
        return 2;
    }

    OrtEnv *env = NULL;
    OrtSessionOptions *options = NULL;
    OrtSession *session = NULL;
    OrtMemoryInfo *memory = NULL;
    check(ort->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "denoise", &env));
    check(ort->CreateSessionOptions(&options));
    check(ort->RegisterCustomOpsLibrary_V2(options, argv[2]));
    check(ort->CreateSession(env, argv[1], options, &session));
    check(ort->CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &memory));

    float picture[PIXELS], noise[PIXELS];
    for (int i = 0; i < PIXELS; i++) picture[i] = (float)(sqrt(-2.0 * log(uniform())) * cos(6.283185307179586 * uniform()));
    for (int step = 0; step < STEPS; step++) {
        int64_t now = lround(999.0 * (STEPS - step) / STEPS), next = lround(999.0 * (STEPS - step - 1) / STEPS);
        predict(session, memory, picture, now, argv[3][0] - '0', noise);
        double a = kept(now), b = kept(next);
        for (int i = 0; i < PIXELS; i++) {
            double clean = fmin(1.0, fmax(-1.0, (picture[i] - sqrt(1.0 - a) * noise[i]) / sqrt(a)));
            double rest = (picture[i] - sqrt(a) * clean) / sqrt(1.0 - a);
            picture[i] = (float)(sqrt(b) * clean + sqrt(1.0 - b) * rest);
        }
    }

    FILE *file = fopen(argv[4], "wb");
    if (file == NULL) {
        perror(argv[4]);
        return 2;
    }
    fprintf(file, "P5\n%d %d\n255\n", SIDE, SIDE);
    for (int i = 0; i < PIXELS; i++) fputc((int)lround((fmin(1.0, fmax(-1.0, picture[i])) + 1.0) * 127.5), file);
    if (fclose(file) != 0) {
        perror(argv[4]);
        return 2;
    }
    print_counters(argv[2]);

    ort->ReleaseMemoryInfo(memory);
    ort->ReleaseSession(session);
    ort->ReleaseSessionOptions(options);
    ort->ReleaseEnv(env);
    return 0;
}
