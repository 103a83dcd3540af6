/* The tiny guest: no operating system, a picture at once.
 *
 * It shows a small desktop, echoes the keys typed, follows the mouse, counts clicks and seconds, shows which session it
 * is (fw_cfg file opt/deskfleet/sid), and powers off by its button or by the ACPI power button. Between interrupts
 * it sleeps in hlt, so an idle guest costs next to no processor time.
 */
#include "devices.h"
#include "screen.h"

/* ---- Layout and colours ------------------------------------------------------------------------------------- */

#define SKY_TOP 0x14304c
#define SKY_BOTTOM 0x3d86ad
#define DARK 0x101820
#define PANEL 0x18242f
#define LINE 0x3a4a58
#define LIGHT 0xe8edf1
#define MUTED 0x93a4b3
#define ACCENT 0xffb703
#define BUTTON 0xb3322e
#define CLICK 0xff5a4f

#define PANEL_HEIGHT 32
#define BUTTON_X 688
#define BUTTON_Y 4
#define BUTTON_WIDTH 104
#define BUTTON_HEIGHT 24
#define UPTIME_X 584

#define WINDOW_X 80
#define WINDOW_Y 64
#define WINDOW_WIDTH 640
#define WINDOW_HEIGHT 384
#define TITLE_HEIGHT 26
#define TEXT_X 92                   /* typed text: 77 columns, 21 rows */
#define TEXT_Y 100
#define TEXT_COLUMNS 77
#define TEXT_ROWS 21

#define CARD_X 80
#define CARD_Y 472
#define CARD_WIDTH 640
#define CARD_HEIGHT 100

/* The identity strip for programs that look at the screen: the session id's first 8 bytes, 64 blocks of 8x8 pixels from
 * left to right, each byte from its highest bit, white for 1, black for 0; all grey when the host gave no id. */
#define STRIP_X 144
#define STRIP_Y 520
#define STRIP_BLOCK 8
#define STRIP_BYTES 8

#define ID_FILE "opt/deskfleet/sid"
#define ID_SIZE 72

/* ---- State --------------------------------------------------------------------------------------------------- */

extern volatile u32 ticks;          /* counted by boot.S: the BIOS leaves the timer at 1193182 / 65536 Hz */

static u32 text_column, text_row;
static u32 keys, clicks, buttons;
static volatile char typed[256];    /* what was typed last: no use but to be found in the guest's memory */
static u32 mouse_x = SCREEN_WIDTH / 2, mouse_y = 450;      /* at first between the window and the card, over neither */
static char session_id[ID_SIZE];

static u32 seconds(void)
{
    return (u32)(((unsigned long long)ticks * 3600) >> 16);     /* 65536 ticks are an hour */
}

/* ---- Drawing ------------------------------------------------------------------------------------------------- */

static void draw_window(u32 x, u32 y, u32 width, u32 height)
{
    shadow(x + 6, y + 6, width, height);
    fill(x, y, width, height, DARK);
    frame(x, y, width, height, LINE);
}

static void draw_caret(u32 colour)
{
    fill(TEXT_X + text_column * GLYPH_WIDTH, TEXT_Y + text_row * GLYPH_HEIGHT + 13, GLYPH_WIDTH, 2, colour);
}

static void clear_text(void)
{
    fill(TEXT_X, TEXT_Y, TEXT_COLUMNS * GLYPH_WIDTH, TEXT_ROWS * GLYPH_HEIGHT, DARK);
    text_column = text_row = 0;
}

static void draw_counters(void)
{
    u32 x = text(CARD_X + 64, CARD_Y + 68, "Keys ", MUTED, DARK);
    x = number(x, CARD_Y + 68, keys, 4, LIGHT, DARK);
    x = text(x, CARD_Y + 68, "   Clicks ", MUTED, DARK);
    x = number(x, CARD_Y + 68, clicks, 4, LIGHT, DARK);
    x = text(x, CARD_Y + 68, "   Pointer ", MUTED, DARK);
    x = number(x, CARD_Y + 68, mouse_x, 3, LIGHT, DARK);
    x = text(x, CARD_Y + 68, ",", MUTED, DARK);
    number(x, CARD_Y + 68, mouse_y, 3, LIGHT, DARK);
}

static void draw_uptime(void)
{
    u32 now = seconds();
    u32 x = number(UPTIME_X, 8, now / 3600, 2, LIGHT, PANEL);
    x = text(x, 8, ":", MUTED, PANEL);
    x = number(x, 8, now / 60 % 60, 2, LIGHT, PANEL);
    x = text(x, 8, ":", MUTED, PANEL);
    number(x, 8, now % 60, 2, LIGHT, PANEL);
}

static void draw_identity(void)
{
    fill(CARD_X + 64, CARD_Y + 16, CARD_WIDTH - 72, GLYPH_HEIGHT, DARK);
    u32 x = text(CARD_X + 64, CARD_Y + 16, "Session ", MUTED, DARK);
    for (const char *c = session_id; *c && x < CARD_X + CARD_WIDTH - 16; c++, x += GLYPH_WIDTH)
        glyph(x, CARD_Y + 16, *c > ' ' && *c < 127 ? (u8)*c : '?', ACCENT, DARK);
    if (!session_id[0])
        text(x, CARD_Y + 16, "no id", ACCENT, DARK);
    for (u32 byte = 0; byte < STRIP_BYTES; byte++)
        for (u32 bit = 0; bit < 8; bit++) {
            u32 colour = session_id[byte] & (0x80 >> bit) ? 0xffffff : 0;
            if (!session_id[0])
                colour = 0x808080;
            fill(STRIP_X + (byte * 8 + bit) * STRIP_BLOCK, STRIP_Y, STRIP_BLOCK, STRIP_BLOCK, colour);
        }
}

static void draw_desktop(void)
{
    gradient(SKY_TOP, SKY_BOTTOM);
    fill(0, 0, SCREEN_WIDTH, PANEL_HEIGHT, PANEL);
    fill(0, PANEL_HEIGHT, SCREEN_WIDTH, 1, LINE);
    fill(16, 11, 10, 10, ACCENT);
    text(36, 8, "Tiny guest", LIGHT, PANEL);
    fill(BUTTON_X, BUTTON_Y, BUTTON_WIDTH, BUTTON_HEIGHT, BUTTON);
    text(BUTTON_X + 16, BUTTON_Y + 4, "Power off", 0xffffff, BUTTON);

    draw_window(WINDOW_X, WINDOW_Y, WINDOW_WIDTH, WINDOW_HEIGHT);
    fill(WINDOW_X + 1, WINDOW_Y + 1, WINDOW_WIDTH - 2, TITLE_HEIGHT, ACCENT);
    text(WINDOW_X + 12, WINDOW_Y + 6, "Type here", DARK, ACCENT);

    draw_window(CARD_X, CARD_Y, CARD_WIDTH, CARD_HEIGHT);
    frame(STRIP_X - 2, STRIP_Y - 2, STRIP_BYTES * 8 * STRIP_BLOCK + 4, STRIP_BLOCK + 4, LINE);

    clear_text();
    draw_caret(ACCENT);
    draw_uptime();
    draw_identity();
    draw_counters();
}

/* ---- Keyboard ------------------------------------------------------------------------------------------------ */

/* Scan code set 1, United States layout; '\x1b' marks keys that write nothing. */
static const char plain[] = "\x1b\x1b" "1234567890-=\b\t" "qwertyuiop[]\n\x1b" "asdfghjkl;'`\x1b" "\\zxcvbnm,./\x1b" "*\x1b ";
static const char shifted[] = "\x1b\x1b" "!@#$%^&*()_+\b\t" "QWERTYUIOP{}\n\x1b" "ASDFGHJKL:\"~\x1b" "|ZXCVBNM<>?\x1b" "*\x1b ";

#define KEY_RELEASED 0x80
#define KEY_EXTENDED 0xe0
#define KEY_CONTROL 0x1d
#define KEY_SHIFT_LEFT 0x2a
#define KEY_SHIFT_RIGHT 0x36
#define KEY_ALT 0x38
#define KEY_CAPS_LOCK 0x3a
#define KEY_DELETE 0x53

static void write_character(char c)
{
    typed[keys % sizeof typed] = c;
    draw_caret(DARK);
    if (c == '\b') {
        if (text_column)
            text_column--;
        glyph(TEXT_X + text_column * GLYPH_WIDTH, TEXT_Y + text_row * GLYPH_HEIGHT, ' ', LIGHT, DARK);
    } else if (c == '\t') {
        text_column = (text_column + 8) & ~7u;
    } else if (c == '\n') {
        text_column = TEXT_COLUMNS;
    } else {
        glyph(TEXT_X + text_column * GLYPH_WIDTH, TEXT_Y + text_row * GLYPH_HEIGHT, (u8)c, LIGHT, DARK);
        text_column++;
    }
    if (text_column >= TEXT_COLUMNS) {
        text_column = 0;
        text_row++;
    }
    if (text_row >= TEXT_ROWS)
        clear_text();
    draw_caret(ACCENT);
}

static void handle_key(u8 code)
{
    static int extended, shift, control, alt, caps;

    if (code == KEY_EXTENDED) {
        extended = 1;
        return;
    }
    int from_pad = extended, down = !(code & KEY_RELEASED);
    u8 key = code & ~KEY_RELEASED;
    extended = 0;
    if (key == KEY_CONTROL)
        control = down;
    else if (key == KEY_ALT)
        alt = down;
    else if (!from_pad && (key == KEY_SHIFT_LEFT || key == KEY_SHIFT_RIGHT))
        shift = down;
    else if (key == KEY_CAPS_LOCK)
        caps ^= down;
    else if (key == KEY_DELETE && down && control && alt)
        power_reset();
    else if (down && key < sizeof plain - 1 && (!from_pad || plain[key] == '\n' || plain[key] == '/')) {
        int letter = plain[key] >= 'a' && plain[key] <= 'z';
        char c = shift ^ (caps && letter) ? shifted[key] : plain[key];
        if (c != '\x1b') {
            keys++;
            write_character(c);
        }
    }
}

/* ---- Power off, pointer, main loop --------------------------------------------------------------------------- */

static void shut_down(void)
{
    draw_window(280, 240, 240, 64);
    text(352, 264, "Powering off", LIGHT, DARK);
    for (u32 until = ticks + 9; ticks < until;)     /* half a second, so that people see why the picture goes */
        __asm__ volatile("sti; hlt; cli");
    power_off();
    for (;;)
        __asm__ volatile("hlt");
}

static int on_button(void)
{
    return mouse_x - BUTTON_X < BUTTON_WIDTH && mouse_y - BUTTON_Y < BUTTON_HEIGHT;
}

static void handle_pointer(const struct pointer *pointer)
{
    u32 pressed = pointer->buttons & ~buttons;
    buttons = pointer->buttons;
    mouse_x = pointer->x * SCREEN_WIDTH >> 16;
    mouse_y = pointer->y * SCREEN_HEIGHT >> 16;
    if (pressed & BUTTON_LEFT && on_button())
        shut_down();
    if (pressed)
        clicks++;
    if (buttons & BUTTON_LEFT || pressed)           /* a held left button draws */
        dot(mouse_x, mouse_y, CLICK);
    draw_counters();
}

/* Once a second: the heartbeat, and the id, which changes when a host resumes a saved guest under another session. */
static void every_second(void)
{
    static char now[ID_SIZE];
    fw_cfg_read(ID_FILE, now, sizeof now);
    int changed = 0;
    for (u32 i = 0; i < ID_SIZE; i++) {
        changed |= session_id[i] != now[i];
        session_id[i] = now[i];
    }
    if (changed)
        draw_identity();
    draw_uptime();
}

__attribute__((noreturn)) void main(const u8 *font)
{
    u32 last_second = 0;

    while (!screen_start(font))
        __asm__ volatile("cli; hlt");
    fw_cfg_read(ID_FILE, session_id, sizeof session_id);
    power_start();
    ps2_start();
    vmmouse_start();
    draw_desktop();     /* last: who sees the identity may type and click */
    for (;;) {
        struct pointer pointer;
        int code;

        cursor_show(mouse_x, mouse_y);
        __asm__ volatile("sti; hlt; cli");
        while ((code = keyboard_read()) >= 0) {
            cursor_hide();
            handle_key((u8)code);
            draw_counters();
        }
        while (vmmouse_read(&pointer)) {
            cursor_hide();
            handle_pointer(&pointer);
        }
        if (power_button_pressed())
            shut_down();
        if (seconds() != last_second) {
            cursor_hide();
            last_second = seconds();
            every_second();
        }
    }
}
